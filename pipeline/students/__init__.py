"""Student architectures, their first weights and their files."""
