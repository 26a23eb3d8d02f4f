"""What a run will need, before a machine is paid for."""
