"""What a run would take, in closed form; nothing here needs torch or a machine to run on."""
