"""Pure values and the rules about them. Importing anything here does nothing."""
