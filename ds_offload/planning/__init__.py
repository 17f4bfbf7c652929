"""Planning: what a request takes, whether it fits, what would make it fit, and how long it will take."""
