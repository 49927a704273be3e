"""The YAML file: its schema, how it is read, and the text of its errors."""
