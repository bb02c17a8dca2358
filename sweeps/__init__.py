from qafe.installation import expect

expect("mlflow", "optuna", "ray")
