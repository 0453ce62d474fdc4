"""Child processes: how they are forked, who they become, how they end."""
