"""A module that fails to import."""

raise RuntimeError("the database of this application is missing")
