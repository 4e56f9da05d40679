"""What the processes share (the fabric), and what decides (the policies)."""
