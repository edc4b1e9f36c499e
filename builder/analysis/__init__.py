"""What the blocks of a model do, and how much they are needed."""
