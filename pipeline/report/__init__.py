"""Results to one HTML page. Reads JSON; imports no other room."""
