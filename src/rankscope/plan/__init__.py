"""What a study will take, told before training, and what runs."""
