"""What happens to one layer: a frozen dataclass for each scheme."""
