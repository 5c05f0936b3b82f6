"""Commands of `stillroom` that are not stages of dvc.yaml."""
