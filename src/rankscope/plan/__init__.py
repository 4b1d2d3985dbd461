"""Memory, time and disk of a study, predicted before training, and its division into packs."""
