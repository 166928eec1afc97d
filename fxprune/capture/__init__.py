"""The front end: a model becomes two graphs."""
