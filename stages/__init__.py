"""One thin typed `main` for each DVC stage: reads params, calls pipeline, writes outputs."""
