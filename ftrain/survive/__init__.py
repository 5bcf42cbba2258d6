"""What lets a run survive: hangs are ended with their stacks, bad steps undone, corruption found, steps replayed."""
