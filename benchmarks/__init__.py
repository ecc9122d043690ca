"""Full-size measurements, run by hand: quality on public data and, later, speed. Not part of the tests."""
