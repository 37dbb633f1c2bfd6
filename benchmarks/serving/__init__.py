"""What the serving benchmark is made of: models, load, rivals, and what the machine allows."""
