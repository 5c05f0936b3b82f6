"""Commands that people run by hand with `stillroom`: none of them is a stage of dvc.yaml."""
