"""The demo as resumable steps, each the command that a user would type."""
