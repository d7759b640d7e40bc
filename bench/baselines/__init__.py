"""What ours stands beside: the operations in plain PyTorch, and what others wrote."""
