"""What splitting for a group size buys, on a device that a profile describes."""
