"""Real text for the demo, by package name: where it comes from, and how it is cleaned."""
