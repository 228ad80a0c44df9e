"""What runs in a benchmark's child processes, one library a file: what a runner must have is said in child.py."""
