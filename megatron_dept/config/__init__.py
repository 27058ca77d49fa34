"""What a run is: schema, presets, loading."""
