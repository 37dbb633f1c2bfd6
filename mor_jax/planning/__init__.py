"""What a run would need and reach on devices that are not here yet."""
