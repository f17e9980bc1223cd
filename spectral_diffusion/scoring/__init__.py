"""How well pictures fit their prompts and the photos of the concepts."""
