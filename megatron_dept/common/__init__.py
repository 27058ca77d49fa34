"""What every room needs: errors, files, seeds, progress."""
