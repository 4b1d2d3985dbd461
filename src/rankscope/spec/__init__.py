"""What is asked: the models of study.yaml, candidates, options."""
