"""Files of tables: reading, writing, and what they are made from."""
