"""What it runs on: devices, memories, links and fabrics; what work costs on them; measured profiles."""
