"""What training runs of other tools can say about rank."""
