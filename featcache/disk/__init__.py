"""What is written to disks, and what disks refuse."""
