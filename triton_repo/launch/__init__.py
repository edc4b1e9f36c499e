"""What starts a GPU deployment: commands, containers, Kubernetes manifests and their monitoring."""
