"""The pure machine: decide(definition, state, event) -> (state', effects). Whoever reads it knows the promise."""
