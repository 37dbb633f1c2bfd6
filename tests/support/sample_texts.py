"""Texts of the data tests."""


def words(number: int) -> str:
    """A short text that no other number gives."""
    return f"document {number}: " + " ".join(str(number * k) for k in range(5 + number % 7)) + "\n"
