"""Files of tables, and of floats to make tables from."""
