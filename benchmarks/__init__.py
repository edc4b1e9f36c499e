"""Speed as ratios: to a peer or to the machine's limit, in one run."""
