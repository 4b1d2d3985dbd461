"""The search for the best candidate within a budget, by Optuna: extra `search`."""
