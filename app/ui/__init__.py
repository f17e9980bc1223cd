"""The page: layout and wiring only. Everything that it does is an action."""
