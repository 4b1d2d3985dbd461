"""The question of a study: models of study.yaml, candidates, options."""
