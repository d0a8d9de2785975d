"""What block functions take and give: described, written down, and checked before anything runs."""
