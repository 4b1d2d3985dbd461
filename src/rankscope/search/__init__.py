"""The search for the best candidate within a budget, by Optuna: `pip install 'rankscope[search]'`."""
