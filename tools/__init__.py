"""What the project uses on itself; none of it is in the wheel."""
