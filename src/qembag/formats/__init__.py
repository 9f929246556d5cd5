"""Files of tables: reading and writing them, and the sources of rows that they are made from."""
