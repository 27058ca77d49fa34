"""One silo's DeepSpeed engine; the only room that imports deepspeed."""
