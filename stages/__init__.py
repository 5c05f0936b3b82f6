"""One thin typed `main` a DVC stage: read params, call pipeline, write outputs. Nothing here computes."""
