"""What a run is: the composed config, its presets and how they are loaded."""
