"""What the programs write: files that are whole at any time (`files`), and tables in their places (`tables`)."""
