"""What a model's layers do: importance, dependency, explainability, statistics for smaller parts."""
