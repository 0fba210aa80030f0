"""What the router costs: a whole server whose rank takes no time."""
