"""The teacher stage: fine-tune a model or take it as it is, score it, record it."""
