"""What operations must move and compute, what machines allow, and what a model therefore costs."""
